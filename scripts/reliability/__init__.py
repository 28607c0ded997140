"""What reliability checks share: a run of every stage, in processes that cost little to kill."""
