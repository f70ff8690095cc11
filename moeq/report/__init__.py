"""Tables, figures and result files."""
