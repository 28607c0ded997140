"""What attention over several GPUs costs, predicted from a few measured rates; imports no torch."""
