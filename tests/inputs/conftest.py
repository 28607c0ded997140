from tests.adapter_format.fixtures import copies, llama, one_thread

__all__ = ["copies", "llama", "one_thread"]
