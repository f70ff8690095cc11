"""What each width would cost each weight: a survey of the original model."""
