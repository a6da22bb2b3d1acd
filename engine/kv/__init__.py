"""Who owns which block of KV memory: block tables, cached prefixes, swapped blocks."""
