"""What moeq does on a GPU: right, how fast, in which memory; one process that ends within eight minutes."""
