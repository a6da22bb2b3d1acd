"""One folder per operation: public function, reference, and implementations."""
