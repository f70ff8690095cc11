"""One question each; a result has the name of its study."""
