"""One run of validate: tasks, finished documents, the model and its original."""
