"""The adapter directory that `extract` writes and `merge` reads: see `peft_files` and `sidecar`."""
