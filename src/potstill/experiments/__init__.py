"""Many runs: seeds now, sweeps and searches later."""
