"""What scripts/long_trials.py and scripts/peers_transfer.py are made of."""
