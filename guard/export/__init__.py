"""The suspect model written for other servers, with what the guard looks at as further outputs."""
