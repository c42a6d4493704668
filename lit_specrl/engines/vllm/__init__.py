"""The vLLM engine in this process; names that vLLM keeps private are in this folder alone."""
