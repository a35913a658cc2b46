"""What was asked: the schema, the loader with every mistake at once, and the making of objects."""
