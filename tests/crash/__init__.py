"""What happens when processes die, stall or lie: nothing that a user can see."""
