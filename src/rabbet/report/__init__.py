"""What a user reads of a plan and a result."""
