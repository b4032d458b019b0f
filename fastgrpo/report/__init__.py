"""Self-contained HTML pages: of one training run or several side by side, of a lab, of an evaluation."""
