"""ReSpec: drafters, how many tokens they draft, and how they learn."""
