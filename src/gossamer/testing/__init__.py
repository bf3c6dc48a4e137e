"""What tests against this library need: seeded toy models of every architecture, and their inputs."""
