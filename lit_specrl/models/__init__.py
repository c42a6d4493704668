"""Everything with weights, and forward passes over given tokens."""
