"""One model behind HTTP: pictures for the clients that people have."""
