"""One training loop for every task. This room knows no family: tasks match its protocols structurally."""
