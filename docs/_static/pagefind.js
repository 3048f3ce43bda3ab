// The search of pagefind without its guesses, for the box of `search.js`. Of a word that
// no page has, pagefind takes the longest beginning that is a word: `s` of `sqlite`. Here
// such a query has no hits. A word that some page has finds no longer ones, and a word
// that is still being typed finds all that start with it.
import { createInstance as createPagefind } from "../pagefind/pagefind.js";

export function createInstance(options) {
  const pagefind = createPagefind(options);

  async function search(query, settings) {
    const answer = await pagefind.search(query, settings);
    for (const word of query?.toLowerCase().match(/[^\s"]*\w[^\s"]*/g) ?? []) {
      // In quotes, a word is not a beginning.
      const whole = (await pagefind.search(`"${word}"`)).results.map((hit) => hit.id);
      const page = await answer.results[0]?.data();
      const isTyped = page?.content.toLowerCase().includes(word);
      if (whole.length || !isTyped) {
        answer.results = answer.results.filter((hit) => whole.includes(hit.id));
      }
    }
    return answer;
  }

  return { ...pagefind, search };
}
