"""Files: adapter folders, model cards, tensors and JSON. Reading is strict, writing is atomic."""

__all__ = ["adapter_folder", "atomic", "hub", "metadata", "model_card", "strict_json", "tensors", "text", "versions"]
