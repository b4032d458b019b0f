"""The sides of a comparison, by name."""

OURS, PLAIN, PAPER, TRL = "ours", "plain", "paper", "trl"
OPPONENTS = {
    PLAIN: "transformers' generate and one padded batch",
    PAPER: "the published code's way",
    TRL: "TRL's GRPOTrainer, as installed in its own environment",
}
"""What `--against` takes."""
