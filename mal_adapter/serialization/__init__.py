"""Bytes: adapter folders, model cards, tensors and JSON, read strictly and written atomically."""

__all__ = ["adapter_folder", "atomic", "hub", "metadata", "model_card", "strict_json", "tensors", "text", "versions"]
