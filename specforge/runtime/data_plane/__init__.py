"""The data plane: feature stores, the manifest, the plan of batches, and the loader."""
