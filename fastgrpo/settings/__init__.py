"""What a user may set: fields, their bounds, and what TRL's mean here."""
