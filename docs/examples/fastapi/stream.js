// Stops runtimes, and yields the outcome of each, then the report.
async function* stopMany(workspace, aliases) {
  const answer = await fetch(`/workspaces/${workspace}/stop`, {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify(aliases),
  });
  if (!answer.ok) throw new Error(`The app answered ${answer.status}.`);
  const reader = answer.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split("\n");
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data: ")) yield JSON.parse(line.slice(6));
      }
    }
  } finally {
    await reader.cancel();
  }
}
