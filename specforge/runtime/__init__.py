"""Feature stores, references and batches, independent of algorithms, models and trainers."""
