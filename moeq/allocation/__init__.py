"""Plans under a budget: which weight gets how many bits."""
