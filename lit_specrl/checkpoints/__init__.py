"""Files that are whole or absent: checkpoints, and what ranks keep beside them."""
