"""What a run will take, known before it is paid for: memory, time and cost on devices that need not be here."""
