from tests.adapter_format.fixtures import copies, llama, one_thread, qwen2

__all__ = ["copies", "llama", "one_thread", "qwen2"]
