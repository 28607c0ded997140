"""The loaders of serving engines, run on a CPU from their unpacked wheels."""
