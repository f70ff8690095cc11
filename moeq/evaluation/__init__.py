"""One run of validate: tasks and their finished documents, the model, the original it is compared with."""
