"""The engine over HTTP, in the shapes that OpenAI's clients speak. Needs the extra `gossamer[serve]`."""
