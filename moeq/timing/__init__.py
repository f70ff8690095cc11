"""How long this machine takes for products with packed weights: the table by which an allocator knows time."""
