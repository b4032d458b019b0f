"""Rewards, the answers they read, and advantages within a group."""
