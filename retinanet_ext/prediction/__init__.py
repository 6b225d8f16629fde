"""Detections of loose images and videos by a trained run, as files."""
