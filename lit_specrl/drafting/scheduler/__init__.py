"""How many tokens to draft at the present batch size."""
