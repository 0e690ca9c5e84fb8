"""What a model costs, and how close a pruned one is to its dense one."""
