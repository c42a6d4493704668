"""What a drafter learns from the policy, and how."""
