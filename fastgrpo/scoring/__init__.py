"""What a completion is worth: rewards, the answers they read, advantages within a group."""
