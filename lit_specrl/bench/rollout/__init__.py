"""`lit-specrl bench rollout`: whether a callback pays, for the user's own model and data."""
