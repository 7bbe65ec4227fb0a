"""Images on their way to the device."""
