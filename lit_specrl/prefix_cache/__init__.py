"""SPEC-RL: which part of an earlier response a new rollout begins with."""
