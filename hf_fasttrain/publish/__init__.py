"""A finished run made into something for others. Reads run folders only, and never trains."""
