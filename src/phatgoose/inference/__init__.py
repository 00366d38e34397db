"""A model's answers (generation) and its loss on given answers (scoring), in batches."""
