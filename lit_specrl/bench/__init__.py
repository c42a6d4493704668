"""Measurements that a user can repeat: `lit-specrl bench`."""
