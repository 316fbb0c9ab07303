"""The substrate: feature stores, references, batches. It knows no algorithm, model or trainer."""
