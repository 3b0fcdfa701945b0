"""One module a command, and what the trainings share. Only this room writes folders of results and prints."""
