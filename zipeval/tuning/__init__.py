"""Train the projector of VisionZip‡."""
